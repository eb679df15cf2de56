"""The report page of a dataset: its content, findings, and figures of single sessions."""
