#pragma once

// The checks of a launch: races, missing fences, asynchronous operations touched too early,
// undefined values. One object a launch; a conflict is thrown as exec::Failure.

#include <memory>

#include "../exec/observer.h"

namespace gpu_emulator::exec {
struct LaunchState;
}

namespace gpu_emulator::check {

// nullptr where the launch's options ask for no check that needs an observer.
std::unique_ptr<exec::Observer> make_checker(const exec::LaunchState& launch);

}  // namespace gpu_emulator::check
