"""The same functions as ``flash_attn_interface``."""

from flash_attn_interface import *  # noqa: F403
from flash_attn_interface import __all__  # noqa: F401
