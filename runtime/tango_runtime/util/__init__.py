"""Small things that every package uses: files written aside, the console, checked JSON."""
