#pragma once

/// FOVEA_API marks what the shared library exports; everything else stays hidden.
#if defined(__GNUC__)
#define FOVEA_API __attribute__((visibility("default")))
#else
#define FOVEA_API
#endif
