"""The data plane's verbs, one call each, safe to run twice."""
