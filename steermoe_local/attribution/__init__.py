"""Attribution: which experts cause a behaviour, estimated by random interventions."""
