"""Speech: from uploaded audio to its words. Knows nothing of HTTP."""
