"""The small model that Lightship serves by default: its documents, its training, its evaluation. Only for the demonstration."""
