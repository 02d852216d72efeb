// The targets that were built and that this CPU can run. TILEWISE_TARGET forces one. A further one,
// amx-emulated, is there only by its name: amx with slow code for its tile instructions.
#pragma once
#include <string>
#include <vector>

namespace tilewise {

enum class Target { kAmx, kAvx512Bf16, kAvx512, kAvx2, kPortable, kAmxEmulated };

std::vector<std::string> available_targets();  // best first
Target active_target();  // throws std::invalid_argument where TILEWISE_TARGET names none of them
const char* target_name(Target target);
void set_target(const std::string& name);  // throws std::invalid_argument

}  // namespace tilewise
