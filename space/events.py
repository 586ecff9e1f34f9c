"""How the Space's small events behave: at once instead of queued, without a spinner, unseen by the API."""

from typing import Any

QUIET: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
