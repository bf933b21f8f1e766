"""Whether the compiled loops can be had: where numba does not import, torch operations do the same."""

import logging
from functools import cache
from typing import Any

_log = logging.getLogger(__name__)


@cache
def kernels() -> Any:
    """Return the module `kernels`; None, and a word in the log, where numba does not import."""
    try:
        # numba takes a while to import: not before there are counts to work on.
        from pyrosc import kernels
    except Exception as error:  # an ImportError, or a RuntimeError where its cache can be written nowhere
        _log.warning(
            "numba cannot be used (%s): slower torch operations take the place of its loops. If its cache "
            "is the cause, set NUMBA_CACHE_DIR to a folder that can be written",
            error,
        )
        return None
    return kernels
