"""`iqa-serve`: scores over HTTP, for programs and for people.

`diffiqa.serve(...)` runs it. `api.py` has that function: it opens engines and a port, and drains at the end. `work.py`
is the queue in front of the engines, without HTTP. `http.py` has the routes, `page.py` those of the page for people.
`visit.py` is what one request goes through, `door.py` what stands around all of them, `connection.py` what is ours of
HTTP itself. `form.py` and `protocol.py` take bodies apart: forms, and the Open Inference Protocol. `limits.py` says
what is refused. `triton.py` is another way in: a model for a Triton server.
"""

from ..rooms import make_callable

make_callable(__name__)
