"""How the devices' answers reach the cloud."""
