"""`iqa-bench`: how fast the deployed pipeline is here, whether that figure can be trusted, and how fast others are.

`running.py` opens what runs, on the CPU or a GPU, `measure.py` times our own pipeline and `peers.py` what one could run
instead; `results.py` holds what they find, and `report.py` and `page.py` show it.
"""

# Not a part of `runtime/`: some peers need torch, and the runtime never imports it. This folder may import all others;
# none imports it.
