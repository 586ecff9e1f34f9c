"""Shim, as `configuration_duet_moe.py` beside it: `save_pretrained` puts the real file in its place."""

from duet_moe.configuration.modes import (
    AUTO,
    BUILT_IN_MODES,
    Mode,
    NotInThisVersionError,
    modes_as_dict,
    resolve_mode,
    voiced,
)
