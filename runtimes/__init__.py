"""What an app embeds: sessions over bundles."""
