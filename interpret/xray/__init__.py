"""What a decoder does with a text, instrument by instrument; `weft.interpret.xray.report.report` runs them all."""
