"""A full disk: how a failed write of that kind is told from all others. What to do about it is for whoever writes.

Libraries wrap the system's error in their own (safetensors, shutil), so its number is looked for in their text too.
"""

from __future__ import annotations

import errno
import re

NUMBERS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # no space, no quota, over the size that a file may have
_WRAPPED = re.compile(rf"(?:\[Errno|\(os error) (?:{'|'.join(map(str, NUMBERS))})[\])]")


def is_full(error: BaseException) -> bool:
    """True where a write failed because the disk or the quota takes no more."""
    return getattr(error, "errno", None) in NUMBERS or bool(_WRAPPED.search(str(error)))
