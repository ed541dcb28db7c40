"""Videos with questions: folders, and clips that are generated."""
