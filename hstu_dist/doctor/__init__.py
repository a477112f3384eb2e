"""What `doctor` looks at before a run is blamed: packages, machine, folders, and what lies between the ranks."""
