// torch.classes.mambaquant.Sampler: draws the next token of each sequence of a batch. A class and not an operator,
// since it has state: the random numbers' position, the ids that a repetition penalty counts, and its scratch memory.
#pragma once

#include <torch/library.h>

namespace mambaquant::binding {

void register_sampler(torch::Library& m);

}  // namespace mambaquant::binding
