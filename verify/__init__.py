"""`iqa-verify`: whether an engine, a build or a precision plan still computes the model. `diffiqa.verify(...)` runs it.

Data flows one way: `sides` opens the two engines, `trace` records what they compute, `figures` measures the difference,
`compare` does this for all images, `limits` judges; `bisect` finds the nodes to blame. `scores` compares with another
program's scores alone.
"""

from ..rooms import make_callable

make_callable(__name__)
