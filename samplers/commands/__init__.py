"""The commands of ``fewstep``, one module each; `fewstep` puts them together."""
