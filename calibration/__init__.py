"""Precision that is measured: activation statistics of the real loop, plans and quantised engines made from them."""
