"""Who carries tasks to devices and their answers back."""
