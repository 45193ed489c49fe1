// torch.classes.mambaquant.LanguageModel: a model's tensors, checked once, and the native call over them. A class and
// not an operator, since checking some hundred tensors would cost more than computing a token.
#pragma once

#include <torch/library.h>

namespace mambaquant::binding {

void register_language_model(torch::Library& m);

}  // namespace mambaquant::binding
