"""One question a file, answered with Records; nothing here prints."""
