"""Output that appears whole or not at all: files and folders, on disks and in stores."""
