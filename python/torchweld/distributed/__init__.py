"""torchweld on several devices."""
