#pragma once

#include <fovea/export.h>

#include <stdexcept>
#include <string>

namespace fovea {

/// Why a call was refused or failed.  The values are those of `fovea_status` in c.h.
enum class ErrorCode : int {
  kInvalidArgument = 1,  ///< the caller's input breaks the contract (docs/contract.md)
  kUnsupported = 2,      ///< a valid problem that no allowed backend runs; the message carries the reasons
  kOutOfMemory = 3,      ///< memory for a plan or a workspace could not be had
  kDevice = 4,           ///< the device or the system failed
  kInternal = 5,         ///< a defect of Fovea itself
};

/// Every failure of the library.  `what()` is one sentence with the offending value and what to do.
class FOVEA_API Error : public std::runtime_error {
 public:
  Error(ErrorCode code, const std::string& sentence) : std::runtime_error(sentence), code_(code) {}
  [[nodiscard]] ErrorCode code() const noexcept { return code_; }

 private:
  ErrorCode code_;
};

}  // namespace fovea
