"""The command: arguments, progress, and how plans, bundles, profiles and calibrations are shown."""
