"""What the command line offers. Nothing else imports from here."""
