"""The report that an officer reads: verdict, trust, ledger, evidence, gain, and what is not protected."""
