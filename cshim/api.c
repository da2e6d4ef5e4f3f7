/* The table: every slot of PJRT 0.104 is a function; those below say that they are not there. */
#include "shim.h"

#define STUB(name)                                                                      \
  PJRT_Error* name(PJRT_##name##_Args* args) {                                          \
    (void)args;                                                                         \
    return error_new(PJRT_Error_Code_UNIMPLEMENTED, "PJRT_" #name " is not implemented"); \
  }

STUB(AsyncHostToDeviceTransferManager_AddMetadata)
STUB(AsyncHostToDeviceTransferManager_BufferCount)
STUB(AsyncHostToDeviceTransferManager_BufferSize)
STUB(AsyncHostToDeviceTransferManager_Destroy)
STUB(AsyncHostToDeviceTransferManager_Device)
STUB(AsyncHostToDeviceTransferManager_RetrieveBuffer)
STUB(AsyncHostToDeviceTransferManager_SetBufferError)
STUB(AsyncHostToDeviceTransferManager_TransferData)
STUB(AsyncHostToDeviceTransferManager_TransferLiteral)
STUB(AsyncTrackingEvent_Destroy)
STUB(Buffer_Bitcast)
STUB(Buffer_CopyRawToHostFuture)
STUB(Buffer_DonateWithControlDependency)
STUB(Client_CreateAliasBuffer)
STUB(Client_CreateBuffersForAsyncHostToDevice)
STUB(Client_CreateUninitializedBuffer)
STUB(Client_CreateViewOfDeviceBuffer)
STUB(Client_DmaMap)
STUB(Client_DmaUnmap)
STUB(Client_FulfillAliasBuffer)
STUB(Client_UpdateGlobalProcessInfo)
STUB(CopyToDeviceStream_AddChunk)
STUB(CopyToDeviceStream_CurrentBytes)
STUB(CopyToDeviceStream_Destroy)
STUB(CopyToDeviceStream_GranuleSize)
STUB(CopyToDeviceStream_TotalBytes)
STUB(Device_CreateAsyncTrackingEvent)
STUB(Device_PoisonExecution)
STUB(TopologyDescription_Deserialize)

/* jaxlib 0.10 to 0.12 holds the GIL while another of its threads compiles for a topology without a client: the compiler, which is Python,
 * would wait for ever. */
PJRT_Error* TopologyDescription_Create(PJRT_TopologyDescription_Create_Args* args) {
  (void)args;
  return error_new(PJRT_Error_Code_UNIMPLEMENTED,
                   "PJRT_TopologyDescription_Create: topology not implemented; jax.experimental.topologies.get_attached_topology() has this "
                   "process's devices");
}

/* The framework casts what it gets to non-const, but nobody writes to it. */
static const PJRT_Api api = {
    .struct_size = PJRT_SIZE_UP_TO(PJRT_Api, PJRT_Executable_ParameterMemoryKinds),
    .extension_start = (PJRT_Extension_Base*)&profiler_extension.base,
    .pjrt_api_version = {.struct_size = PJRT_SIZE_UP_TO(PJRT_Api_Version, minor_version),
                         .major_version = PJRT_ABI_MAJOR,
                         .minor_version = PJRT_ABI_MINOR},
#define SLOT(name) .PJRT_##name = name,
    PJRT_FUNCTIONS(SLOT)
#undef SLOT
};

__attribute__((visibility("default"))) const PJRT_Api* GetPjrtApi(void);
const PJRT_Api* GetPjrtApi(void) { return &api; }
