"""Scripts that measure, and what they measured (results/, JSON with device, versions and commit)."""
