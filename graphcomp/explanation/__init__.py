"""Why a network is not as much faster as it is smaller."""
