"""Is it fast? Measurements beside what the machine can do."""
