"""What each ``qpass`` command does; ``cli`` holds their names and options only, so that help is instant."""
