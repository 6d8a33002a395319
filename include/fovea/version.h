#pragma once

#define FOVEA_VERSION "0.1.0"
