"""`iqa-bench`: throughput one can trust, of ours and of what one could use instead. `diffiqa.bench(...)` runs it.

The results are plain data (`results.py`), which `report.py` and `page.py` show, and which anybody can read again.
"""

from ..rooms import make_callable

make_callable(__name__)
