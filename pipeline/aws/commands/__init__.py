"""The commands of `spaceport aws`, by what they are about. What they need of AWS they import when they run: `--help` is to be quick."""
