"""How the package's per-image functions become TensorFlow graphs."""

import tensorflow as tf

# A decorator: the function is traced once for all pipelines of a process instead of once for each,
# which makes every further pipeline start sooner.
traced_once = tf.function(autograph=False, reduce_retracing=True)
