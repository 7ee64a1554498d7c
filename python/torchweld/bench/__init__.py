"""`torchweld bench`: each op beside torch, checked and then timed."""
