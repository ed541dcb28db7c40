"""Videos with questions: from folders, or generated."""
