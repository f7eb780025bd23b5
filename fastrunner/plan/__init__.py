"""From hooks and configs to something flat: dispatch tables now, lowered steps to come."""
