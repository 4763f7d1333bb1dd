"""Nothing is fetched from a model hub but the model that was asked for. Free of torch, because it has to come before everything."""

from __future__ import annotations

import logging
import sys


def keep_off_hubs() -> None:
    """From now on this process does not find the package `kernels`, through which bitsandbytes and transformers fetch code.

    PEFT imports bitsandbytes where it is installed, and that asks for a kernel while it is imported.
    """
    sys.modules.setdefault("kernels", None)  # type: ignore[arg-type]
    # It would advise the user to install the package that fetches.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
