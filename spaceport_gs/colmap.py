"""COLMAP's Python module, as everything here imports it.

Importing pycolmap makes SIGTERM print a stack trace and abort; this gives the signal back. It also exports a zlib of its own,
in which the system's loses its way if pycolmap is what loads that: Pillow then corrupts memory when it writes a PNG. COLMAP's
own log stays silent: what matters to the user is told by us.
"""

from __future__ import annotations

import signal
import threading
import zlib  # noqa: F401 - before pycolmap, so that the system's zlib is loaded beside it

_on_terminate = signal.getsignal(signal.SIGTERM)

import pycolmap  # noqa: E402

if threading.current_thread() is threading.main_thread() and _on_terminate is not None:
    signal.signal(signal.SIGTERM, _on_terminate)
pycolmap.logging.minloglevel = 3

__all__ = ["pycolmap"]
