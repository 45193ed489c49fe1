// Control of the simulator in a build with MBQ_CUDA=SIM; tests and bench/sim.py use it.
#pragma once

#include <string>

namespace mambaquant::binding {

// While on, every operator of this process calls its CUDA launcher on the CPU tensors it is given.
void set_simulating(bool on);
bool is_simulating();

// What the launchers run on: "a100", "rtx3090", "l40s" or "h100"; throws std::invalid_argument on others.
void set_simulated_device(const std::string& name);

// Checks of third_party/cudasim, such as "race=error"; throws std::invalid_argument on an unknown one.
void set_simulator_checks(const std::string& spec);

// Counters of every launch since the last reset: a JSON array.
std::string simulator_stats();
void reset_simulator_stats();

}  // namespace mambaquant::binding
