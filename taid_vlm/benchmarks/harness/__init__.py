"""Other projects' harnesses: lm-eval for text, lmms-eval as a plug-in, tables for VLMEvalKit."""
