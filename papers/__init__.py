"""The executable bibliography: a page for each paper, and a command that prints published beside ours.

``studies`` declare, in settings and figures, what each page claims; everything is trained by ``privkd``
and audited by ``audits``. Nothing here implements a method.
"""

from privkd.plugins import load_siblings

load_siblings("attacks", "audits")
