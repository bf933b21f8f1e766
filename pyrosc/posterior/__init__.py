"""Questions put to a Fit. Site names are known here, models are not."""
