"""Questions about many videos → a file of answers, which grows line by line and is gone on with after any end."""
