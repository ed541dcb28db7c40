"""The report of an answer: a web page or a picture of the tokens that were kept."""
