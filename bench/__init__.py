"""`iqa-bench`: how fast the pipeline is here, whether to trust that figure, and how fast its peers are.

`diffiqa.bench(...)` runs it. `api.py` has that function and `run.py` its steps. `running.py` opens the engine on the
CPU or a GPU, `measure.py` times our pipeline, and `peers.py` times other ways to score. `results.py` holds the figures
as plain data; `report.py` and `page.py` show them.
"""

from ..rooms import make_callable

make_callable(__name__)
