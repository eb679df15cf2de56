"""What `from slim import SlimBrain` needs: encoding, vectors, predictions, exports. No part of training."""
